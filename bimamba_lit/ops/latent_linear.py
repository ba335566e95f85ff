"""The linear layer of latent weights, as a binary layer trains. O/I out/in features, G groups of inputs."""

from torch import Tensor

from bimamba_lit.kernels.latent_linear import naive
from bimamba_lit.ops.backends import pick
from bimamba_lit.ops.binary_weight import check_latent


def latent_linear(
    x: Tensor,
    latent: Tensor,
    straight_through: str = "identity",
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    out_shift: Tensor | None = None,
    bias: Tensor | None = None,
    reach: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Multiply by the binary weight of latent weights and add a bias, as ``F.linear`` does.

    The weight is that of `binary_weight`, in autocast's dtype where that is on. On Hopper many tokens are multiplied by
    packed signs, forward and backward, without a dense weight.

    Args:
        x: Inputs (..., I).
        latent: Latent weights (O, I), any float dtype.
        straight_through: As in `binary_weight`.
        in_scale: (I,) or (1,).
        out_scale: (O,) or (1,).
        group_scale: (O, G), for G contiguous groups of I / G inputs.
        in_shift: (I,) or (1,).
        out_shift: (O,) or (1,).
        bias: (O,).
        reach: As in `binary_weight`.
        backend: ``"auto"``, ``"naive"``, ``"chunked"`` or ``"triton"``.

    Returns:
        y (..., O); `x`, `latent` and every term receive gradients.

    Raises:
        ValueError: If a shape of the weight's, `straight_through` or the backend is wrong.
        TypeError: If `latent` is not of a float dtype.
        RuntimeError: If `x` does not fit the weight, in ``F.linear``'s words.
    """
    terms = (in_scale, out_scale, group_scale, in_shift, out_shift)
    check_latent(latent, straight_through, *terms, bias, reach)
    run = pick(backend, latent, naive.latent_linear)
    return run(x, latent, straight_through, *terms, bias, reach)
