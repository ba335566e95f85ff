"""What threads trade through shared memory: its texts, run here instruction by instruction for all threads at once."""

import re

import numpy as np
import pytest

trades = pytest.importorskip("bimamba_lit.kernels.binary_linear.triton_trades")


def run(text, outputs, inputs):
    """Run a text of one room; operands are arrays of a word a thread.

    Behind a barrier of warps a thread may read only what its own warp wrote.
    """
    threads = np.arange(len(inputs[0]))
    values = {f"${outputs + n}": np.array(given).astype(np.uint32) for n, given in enumerate(inputs)}
    memory, written = np.zeros(int(re.search(r"room\[(\d+)\]", text)[1]), np.uint32), {}

    def value(name):
        return values[name] if name in values else np.full(len(threads), int(name, 0) & 0xFFFFFFFF, np.uint32)

    def words(place, count):
        name, offset = re.fullmatch(r"\[(\w+) \+ (\d+)\]", place).groups()
        at = values[name].astype(int) + int(offset)
        assert (at % (4 * count) == 0).all()
        return at // 4

    for statement in filter(None, map(str.strip, text.strip("{}").split(";"))):
        operation, *arguments = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", statement)
        match operation.split("."):
            case ["", *_] | ["bar", *_]:
                pass
            case ["mov", _] if arguments[1] == "room":
                values[arguments[0]] = 0 * value("0")
            case ["mov", _]:
                values[arguments[0]] = value(arguments[1])
            case ["mad", "lo", _]:
                values[arguments[0]] = value(arguments[1]) * value(arguments[2]) + value(arguments[3])
            case ["add" | "mul" as kind, "f32"]:
                a, b = (value(name).view(np.float32) for name in arguments[1:])
                values[arguments[0]] = (a + b if kind == "add" else a * b).view(np.uint32)
            case ["fma", "rn", "f32"]:
                a, b, c = (value(name).view(np.float32).astype(float) for name in arguments[1:])
                values[arguments[0]] = (a * b + c).astype(np.float32).view(np.uint32)
            case ["cvt", "rn", "f32", "s32"]:
                values[arguments[0]] = value(arguments[1]).view(np.int32).astype(np.float32).view(np.uint32)
            case ["add", _]:
                values[arguments[0]] = value(arguments[1]) + value(arguments[2])
            case ["max", "s32"]:
                a, b = (value(name).view(np.int32) for name in arguments[1:])
                values[arguments[0]] = np.maximum(a, b).view(np.uint32)
            case ["shfl", "sync", "bfly", _]:
                values[arguments[0]] = value(arguments[1])[threads ^ int(arguments[2])]
            case ["redux", "sync", "max", "s32"]:
                of_warps = value(arguments[1]).view(np.int32).reshape(-1, 32).max(1)
                values[arguments[0]] = of_warps.repeat(32).view(np.uint32)
            case ["st", "shared", _]:
                at = words(arguments[0], 1)
                memory[at] = value(arguments[1])
                written |= dict(zip(at, threads // 32, strict=True))
            case ["ld", "shared", *_]:
                names = arguments[0].strip("{}").split(", ")
                at = words(arguments[1], len(names))
                for n, name in enumerate(names):
                    writers = np.array([written[word] for word in at + n])
                    assert "bar.warp" not in text or (writers == threads // 32).all()
                    values[name] = memory[at + n]
            case _:
                raise NotImplementedError(statement)
    return [values[f"${n}"] for n in range(outputs)]


def random_words(*shape):
    return np.random.default_rng(0).integers(0, 2**31, shape)


@pytest.mark.parametrize("warps", [1, 2, 8])
def test_the_largest_of_all(warps):
    own, thread = random_words(32 * warps), np.arange(32 * warps)
    (found,) = run(trades.largest_text(warps), 1, [own, thread // 32, 0 * thread])
    assert (found == own.max()).all()


@pytest.mark.parametrize("warps", [1, 8])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("digits", [1, 2])
def test_planes(warps, steps, digits):
    thread = np.arange(32 * warps)
    line, maker = thread % 32 // 4, thread // 32 * 32 + thread % 4 * 4
    made = random_words(8 * digits, 32 * warps)
    text = trades.planes_text(warps, steps, 8 * digits)
    taken = run(text, 4 * digits * steps, [*made, thread, maker + line * (32 * warps + 16)])
    for step in range(steps):
        for digit in range(digits):
            for n in range(4):
                right = made[8 * digit + line, maker + 16 * step + n]
                assert (taken[4 * (digits * step + digit) + n] == right).all()


@pytest.mark.parametrize(("parts", "warps"), [(2, 1), (4, 8), (16, 4), (4, 16)])
def test_sums_of_rows(parts, warps):
    thread, own = np.arange(32 * warps), random_words(parts, 32 * warps) % 100_000
    line, share = thread % 32 // 4, 4 * warps // parts
    to, at = line * (4 * warps + 4) + thread // 32 * 4 + thread % 4, thread // share * (4 * warps + 4)
    (found,) = run(trades.rows_text(parts, warps, share), 1, [*own, to, at + thread % share * parts])
    right = [[part[line == row].sum() for row in range(8)] for part in own]
    assert (found == np.ravel(right)[thread // share]).all()


@pytest.mark.parametrize(("parts", "warps"), [(2, 1), (2, 4), (4, 8), (8, 2), (16, 8)])
def test_sums_of_rows_in_steps_of_warps(parts, warps):
    thread, own = np.arange(32 * warps), random_words(parts, 32 * warps) % 1000
    line, share = thread % 32 // 4, 4 * warps // parts
    step = np.array([0.5, 3, 1, 5, 0.25, 7, 2, 6], np.float32)[thread // 32]
    to, at = line * (4 * warps + 4) + thread // 32 * 4 + thread % 4, thread // share * (4 * warps + 4)
    places = [to, at + thread % share * parts, thread % share * parts]
    (found,) = run(trades.steps_text(parts, warps, share), 1, [*own, step.view(np.uint32), *places])
    right = [[(part * step)[line == row].sum() for row in range(8)] for part in own]
    assert (found.view(np.float32) == np.ravel(right)[thread // share]).all()


@pytest.mark.parametrize(("rows", "split"), [(16, 1), (64, 1), (32, 2), (16, 4), (32, 4), (32, 8)])
def test_float_sums(rows, split):
    warps, pitch = rows // 16 * split, trades.sums_pitch(split)
    thread = np.arange(32 * warps)
    warp, lane = thread // 32, thread % 32
    parts, totals = random_words(2, 32 * warps) % 1000, random_words(warps, 4) % 1000
    given = [*parts, totals[warp, lane % 4]]
    to = (warp // split * 16 + lane // 4) * pitch + warp % split * 4 + lane % 4
    places = [to, warp * 4 + lane % 4, thread % rows * pitch]
    inputs = [values.astype(np.float32).view(np.uint32) for values in given] + places
    product, *sums = (values.view(np.float32) for values in run(trades.float_sums_text(rows, split), 5, inputs))
    row = warp // split * 16 + lane // 4
    right = np.array([parts[r % 16 // 8][row == r - r % 16 // 8 * 8].sum() for r in range(rows)])
    assert (product == right[thread % rows]).all()
    for n in range(4):
        assert (sums[n] == totals[:, n].sum()).all()
