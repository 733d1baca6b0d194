"""Context mixing of bytes: every byte comes back, the same code everywhere, and a second decoder agrees."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference_mixed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from neuralcodec.container.errors import CorruptStream
from neuralcodec.entropy.binary import code_bit
from neuralcodec.entropy.bytes import binary, detect, filters, mixing

KINDS = (binary.GENERAL, binary.RECORDS, binary.BITMAP, binary.PICTURE, binary.AUDIO, binary.MACHINE)
TEXT = (
    b'<p class="a">The quick, brown (fox) jumps over [the] lazy dog;\n\tthe quick brown fox,\n\tThe Quick Brown Fox | 1,2,3\r\n'
    b"</p>\nif (x > 0) { y = x * 2; }\n    if (y > 0) { x = y * 2; }\n\0\0\xff\xfe caf\xc3\xa9\n"
)


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def records(n: int, size: int = 13) -> bytes:
    """Rows of a counter and three values that walk at random."""
    rng = random.Random(4)
    rows, values = [], [100, 120, 140]
    for k in range(n):
        values = [(v + rng.choice((-1, 0, 0, 1))) % 256 for v in values]
        rows.append((b"\x03\x0a" + k.to_bytes(3, "little") + bytes(values)).ljust(size, b"\x20"))
    return b"".join(rows)


def bitmap(width: int = 96, height: int = 40) -> bytes:
    """Discs here and there, black on white, most significant bit left."""
    rng = np.random.default_rng(8)
    y, x = np.mgrid[:height, :width]
    dots = np.zeros((height, width), bool)
    for _ in range(width * height // 400):
        cx, cy, r = rng.integers(0, width), rng.integers(0, height), rng.integers(2, 9)
        dots |= (x - cx) ** 2 + (y - cy) ** 2 < r * r
    return np.packbits(dots, axis=1).tobytes()


def round_trip(data: bytes, effort: int, kind: int, stride: int = 4, row: int = 16) -> int:
    plan = binary.plan_of(effort, kind)
    code = binary.encode(array(data), plan, stride, row, room=2 * len(data) + 64)
    assert code is not None
    assert binary.decode(code, len(data), plan, stride, row).tobytes() == data
    return len(code)


# --- primitives -------------------------------------------------------------------------------------------------------


def test_tables_are_exact_and_inverse():
    assert mixing.SQUASH[mixing.CLAMP] == 32768 and mixing.SQUASH[-1] == 65535 and mixing.SQUASH[0] == 1
    assert (np.diff(mixing.SQUASH) >= 0).all() and (np.diff(mixing.STRETCH) >= 0).all()
    assert (mixing.STRETCH == -mixing.STRETCH[::-1]).all()
    for s in range(-1500, 1500, 7):
        assert abs(mixing.stretch(mixing.squash(s)) - s) < 40


def test_coder_reaches_the_entropy():
    """20,000 bits of many probabilities: within 0.1 % of what they are worth, and exactly back."""
    rng = np.random.default_rng(2)
    p = np.concatenate([rng.integers(1, 65536, 10_000), np.repeat([1, 65535, 30, 65000], 2500)])
    bits = (rng.random(len(p)) * 65536 < p).astype(int)
    state, buffer = np.zeros(4, np.int64), np.zeros(40_000, np.uint8)
    mixing.coder_start(state, buffer, False)
    for bit, q in zip(bits.tolist(), p.tolist()):
        code_bit(bit, q, state, buffer, False)
    size = mixing.coder_finish(state, buffer)
    ideal = -np.log2(np.where(bits == 1, p, 65536 - p) / 65536).sum() / 8
    assert ideal <= size <= ideal * 1.001 + 4
    stream = buffer[:size].copy()
    mixing.coder_start(state, stream, True)
    assert [code_bit(0, q, state, stream, True) for q in p.tolist()] == bits.tolist()


def test_buckets_are_found_again_and_replaced():
    table = mixing.bucket_table(4)
    at = mixing.find_bucket(table, 0x12345678)
    table[at + 1] = mixing.slot_next(0, 1, 30)
    assert mixing.find_bucket(table, 0x12345678) == at and table[at + 1] != 0
    assert mixing.slot_p18(int(table[at + 1])) > 1 << 17
    places = {mixing.find_bucket(table, h << 16 | h) for h in range(1, 50)}
    assert places <= {0, 16, 32, 48}


# --- the coder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("effort", [1, 2, 5, 9])
def test_every_kind_and_effort(kind, effort):
    for data, stride, row in ((TEXT * 3, 4, 16), (records(80), 13, 26), (bitmap(), 12, 12), (bytes(range(256)), 1, 1)):
        round_trip(data, effort, kind, stride, row)


@pytest.mark.parametrize("effort, kind, stride, row", [
    (1, binary.GENERAL, 4, 16), (9, binary.GENERAL, 4, 16), (5, binary.RECORDS, 13, 26), (9, binary.RECORDS, 13, 39),
    (9, binary.BITMAP, 12, 12), (9, binary.PICTURE, 3, 24), (7, binary.AUDIO, 4, 2), (9, binary.MACHINE, 4, 16),
])  # fmt: skip
def test_second_decoder_agrees(effort, kind, stride, row):
    dots = bitmap(96, 16)
    samples = {binary.RECORDS: records(15), binary.BITMAP: dots, binary.PICTURE: dots[:100], binary.AUDIO: records(9)}
    data = samples.get(kind, TEXT + TEXT[:40])
    plan = binary.plan_of(effort, kind)
    code = binary.encode(array(data), plan, stride, row, room=2 * len(data))
    got = reference_mixed.decode(code, len(data), plan.contexts, plan.pixels, plan.matches, plan.refine, stride, row)
    assert got == data


def test_structure_is_found():
    """Each kind must gain from what it looks at: sizes against the general plan on data of its kind."""
    rng = np.random.default_rng(6)
    walks = np.cumsum(rng.integers(-1, 2, (700, 11)), 0) + rng.integers(0, 256, 11)
    rows, dots = (walks % 256).astype(np.uint8).tobytes(), bitmap(960, 300)
    assert round_trip(rows, 5, binary.RECORDS, 11, 22) < 0.9 * round_trip(rows, 5, binary.GENERAL)
    assert round_trip(dots, 5, binary.BITMAP, 120, 120) < 0.9 * round_trip(dots, 5, binary.GENERAL)
    prose = (Path(binary.__file__).parent / "mixing.py").read_bytes()
    sizes = [round_trip(prose, effort, binary.GENERAL) for effort in (1, 5, 9)]
    assert sizes == sorted(sizes, reverse=True) and sizes[1] < 0.96 * sizes[0]


def test_room_is_respected():
    noise = np.random.default_rng(1).integers(0, 256, 5000).astype(np.uint8)
    assert binary.encode(noise, binary.plan_of(1, binary.GENERAL)) is None
    assert len(binary.encode(noise, binary.plan_of(1, binary.GENERAL), room=6000)) > 5000


def test_wrong_lengths_are_seen():
    plan = binary.plan_of(1, binary.GENERAL)
    code = binary.encode(array(TEXT), plan)
    for bad in (code + bytes(9), code[:20]):
        with pytest.raises(CorruptStream):
            binary.decode(bad, len(TEXT), plan)


def test_same_code_everywhere(tmp_path):
    """Native and generic instruction sets, in processes of their own that compile anew; threads beside each other."""
    script = (
        "import hashlib, sys, numpy as np; from concurrent.futures import ThreadPoolExecutor\n"
        "from neuralcodec.entropy.bytes import binary\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_bytes_binary as t\n"
        "print(t.digest())\n"
    )
    cache = tmp_path / "generic"
    results = set()
    for extra in ({}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(cache)}):
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | extra
        run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        results.add(run.stdout)
    assert len(results) == 1 and any(cache.rglob("*.nbi"))


def digest() -> str:
    """sha256 of codes of all kinds, made in one thread and in two at once (which must be the same)."""
    from concurrent.futures import ThreadPoolExecutor

    tasks = [(kind, data, stride) for kind in KINDS for data, stride in ((TEXT * 4, 4), (records(60), 13), (bitmap(), 12))]

    def work(task: tuple[int, bytes, int]) -> bytes:
        kind, data, stride = task
        return binary.encode(array(data), binary.plan_of(9, kind), stride, 2 * stride, room=2 * len(data) + 64)

    one = [work(task) for task in tasks]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, tasks)) == one
    return hashlib.sha256(b"".join(one)).hexdigest()


def test_each_part_is_worth_something():
    """On data where it matters, leaving a part out costs bytes."""
    noise = random.Random(3).randbytes(1500)
    data = array(TEXT * 2 + noise + records(100) + noise + TEXT * 2)
    plan = binary.plan_of(5, binary.RECORDS)
    order1 = replace(plan, contexts=(1,))
    for whole, changed in (
        (plan, replace(plan, contexts=plan.contexts[:2])), (plan, replace(plan, boost=0)), (order1, replace(order1, matches=0)),
    ):  # fmt: skip
        assert len(binary.encode(data, changed, 13, 26, room=9000)) > 1.002 * len(binary.encode(data, whole, 13, 26))


# --- filters and detection --------------------------------------------------------------------------------------------


@given(st.binary(max_size=80), st.sampled_from((filters.X86_ANY, filters.SPARC, filters.ARM64)), st.data())
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
def test_filters_are_reversible(data, which, more):
    codes = (b"\xe8\1\2\0\0", b"\xe9\xf0\xff\xff\xff", b"\xe8\xe8\0\0\xff", b"\x40\0\1\2", b"\x7f\xff\xff\0")
    codes += (b"\1\2\3\x94", b"\xff\xff\xff\x97")
    opcodes = more.draw(st.lists(st.tuples(st.integers(0, 80), st.sampled_from(codes)), max_size=8))
    mutable = bytearray(data)
    for at, code in opcodes:
        mutable[at : at + len(code)] = code
    original = array(bytes(mutable))
    assert filters.inverse(filters.forward(original, which), which).tobytes() == original.tobytes()


def test_calls_within_calls():
    """What the first x86 filter could not undo: a call whose operand begins where an E8 before it looks for its last byte."""
    data = array(bytes(15) + b"\xe8\1\2\xe8\xe8\0\0\xff")
    assert not np.array_equal(filters.inverse(filters.forward(data, filters.X86), filters.X86), data)
    assert np.array_equal(filters.inverse(filters.forward(data, filters.X86_ANY), filters.X86_ANY), data)


@pytest.mark.parametrize("which", [filters.X86, filters.X86_ANY])
def test_filter_makes_targets_equal(which):
    """Two calls of one function from different places look alike afterwards."""
    calls = b"".join(b"\xe8" + (1000 - at - 5).to_bytes(4, "little", signed=True) + b"\x90" * 5 for at in range(0, 500, 10))
    out = filters.forward(array(calls), which)
    assert np.array_equal(filters.inverse(out, which), array(calls))
    assert len({out[k : k + 5].tobytes() for k in range(0, 500, 10)}) == 1


def test_kinds_are_recognised():
    assert detect.kind_of(array(records(3000)))[:2] == (binary.RECORDS, 13)
    assert detect.kind_of(array(bitmap(960, 300))) == (binary.BITMAP, 120, 120)
    elf = b"\x7fELF\1\2\1" + bytes(9) + b"\0\2\0\2" + bytes(200)
    assert detect.machine_of(elf) == "sparc" and detect.kind_of(array(elf))[0] == binary.MACHINE
    wave = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\1\0\2\0\x44\xac\0\0\x10\xb1\2\0\4\0\x10\0data" + bytes(100)
    assert detect.kind_of(array(wave)) == (binary.AUDIO, 4, 2)
    assert detect.kind_of(array(b"P5\n# a comment\n300 2\n255\n" + bytes(600))) == (binary.PICTURE, 1, 300)
    assert detect.is_text(array("Ein schöner Tag, nicht wahr?\n".encode() * 30)) and detect.is_text(array(TEXT[:120] * 9))
    assert not detect.is_text(array(records(200)))
    noise = np.random.default_rng(0).integers(0, 256, 1 << 16).astype(np.uint8)
    assert detect.is_noise(noise) and not detect.is_noise(array(TEXT * 200))


def test_mixed_content_is_cut():
    noise = np.random.default_rng(0).integers(0, 256, 1 << 18).astype(np.uint8)
    text = array(TEXT[:120] * 2400)[: 1 << 18]
    runs = detect.segments(np.concatenate([text, noise, text]))
    assert [kind for *_, kind in runs] == [detect.TEXT, detect.NOISE, detect.TEXT]
    assert runs[0][0] == 0 and runs[-1][1] == 3 << 18 and all(a[1] == b[0] for a, b in zip(runs, runs[1:]))
