"""What fitting one layer gives."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PTBResult:
    """One layer after post-training binarization.

    Attributes:
        weight: ``(O, I)`` fp32, exactly what the scheme's ``decode`` makes of ``parts``.
        parts: The layer as it is stored: bits packed to uint8, scales in fp16. Its bytes are its true size.
        terms: Where the weight is one sign an entry and the terms of :mod:`bimamba_lit.binarize.linear`, those terms in
            fp32; ``compose`` of them and of ``parts["signs"]`` is exactly ``weight``. Otherwise None.
        damping: Share of the Hessian's mean diagonal that was added to it; None where the scheme took no Hessian. It is
            above the scheme's own where the Hessian was too near singular.
    """

    weight: Tensor
    parts: dict[str, Tensor]
    terms: dict[str, Tensor] | None = None
    damping: float | None = None

    def storage(self) -> dict[str, int]:
        """Return the bits of each part: those of the bytes that it is stored in."""
        return {name: 8 * part.nbytes for name, part in self.parts.items()}

    @property
    def bits(self) -> int:
        """The bits of all parts together."""
        return sum(self.storage().values())
