"""What threads trade through shared memory: its texts, run here instruction by instruction for all threads at once."""

import re

import numpy as np
import pytest

trades = pytest.importorskip("bimamba_lit.kernels.binary_linear.triton_trades")
pairs = pytest.importorskip("bimamba_lit.kernels.binary_linear.triton_pair_trades")


def run(text, outputs, inputs, room=""):
    """Run a text of one room; operands are arrays of a word a thread.

    Behind a barrier of warps a thread may read only what its own warp wrote. With the text of a room made before, half
    of the threads are another program's, each has a memory, and waits for as many bytes as the room's text says.
    """
    threads = np.arange(len(inputs[0]))
    values = {f"${outputs + n}": np.array(given).astype(np.uint32) for n, given in enumerate(inputs)}
    size = int(re.search(r"room\[(\d+)\]", room or text)[1])
    memory, written = np.zeros(2 * size, np.uint32), {}
    own = threads // (len(threads) // 2) * size if room else 0 * threads
    come = [0, 0]

    def value(name):
        return values[name] if name in values else np.full(len(threads), int(name, 0) & 0xFFFFFFFF, np.uint32)

    def words(place, count):
        name, offset = re.fullmatch(r"\[([$\w]+) \+ (\d+)\]", place).groups()
        at = values[name].astype(int) + int(offset)
        assert (at % (4 * count) == 0).all()
        return at // 4

    for statement in filter(None, map(str.strip, text.strip("{}").split(";"))):
        chosen = threads >= 0
        if statement.startswith("@has"):
            statement, chosen = statement.removeprefix("@has "), values["has"]
        operation, *arguments = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", statement)
        match operation.split("."):
            case ["", *_] | ["bar", *_] | ["@!done", *_]:
                pass
            case ["mapa", *_]:
                values[arguments[0]] = value(arguments[1]) + 4 * size * value(arguments[2])
            case ["setp", "lt", _]:
                values[arguments[0]] = value(arguments[1]) < value(arguments[2])
            case ["st", "async", *_]:
                names = arguments[1].strip("{}").split(", ")
                at = words(arguments[0], len(names))
                assert (value(arguments[2].strip("[]")) == 4 * size * (at // size)).all(), "another program's barrier"
                for n, name in enumerate(names):
                    assert not set(at[chosen] + n) & set(written), "two stores to one place"
                    memory[at[chosen] + n] = value(name)[chosen]
                    written |= dict.fromkeys(at[chosen] + n)
                    come = [count + (at[chosen] // size == program).sum() for program, count in enumerate(come)]
            case ["WAIT:", *_]:
                assert come == 2 * [int(re.search(r"\[room\], (\d+);", room.split("expect_tx")[1])[1]) // 4]
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
                at = words(arguments[1], len(names)) + own
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


@pytest.mark.parametrize("warps", [2, 16])
def test_planes_of_two_programs(warps):
    thread, half = np.arange(32 * warps), 16 * warps
    line, maker = thread % 32 // 4, thread // 32 * 32 + thread % 4 * 8
    made = random_words(8, 32 * warps)
    right = [made[line, maker + n] for n in range(8)]
    for own in (slice(half), slice(half, None)):
        places = [thread[own] % half, maker[own] % half + line[own] * (half + 4)]
        taken = run(pairs.halves_text(warps), 8, [*made[:, own], *places])
        assert all((a == b[own]).all() for a, b in zip(taken, right, strict=True))


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize(("rows", "warps"), [(128, 16), (256, 16), (64, 8)])
def test_sums_of_two_programs(rows, warps, terms):
    thread = np.arange(32 * warps)
    lane, warp, own = thread % 32, thread // 32, thread % (16 * warps)
    share, kept, pitch = 32 * warps // rows, rows // 32, pairs.pitch_of(rows, warps)
    of_warps, of_terms = random_words(warps, rows) % 1000, random_words(warps, 2) % 1000
    column, upper = lane % 2, lane // 2 % 2
    # A lane's rows: of its program's half, and of that the upper half where its second bit is set.
    sums = [of_warps[warp, column * (rows // 2) + upper * (rows // 4) + 8 * n + lane // 4] for n in range(kept)]
    given = [values.astype(np.float32).view(np.uint32) for values in (*sums, of_terms[warp, upper])]
    to = warp * pitch + (upper * 8 + lane // 4) * kept
    places = [0 * thread, column, to, warp * 2 + upper, own % share * pitch + own // share, lane]
    text, room = pairs.pair_text(rows, warps, terms), pairs.room_text(rows, warps, terms)
    found, *totals = (values.view(np.float32) for values in run(text, 3, [*given, *places], room))
    place = thread // share % (rows // 2)
    row = thread // share // (rows // 2) * (rows // 2)
    row += place // (8 * kept) * (8 * kept) + place % kept * 8 + place // kept % 8
    assert (found == of_warps.sum(0)[row]).all()
    assert all((total == terms * of_terms[:, n].sum()).all() for n, total in enumerate(totals))
