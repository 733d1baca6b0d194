"""Made the golden files of bytes, once. Never run by a test; a new format version adds files, it replaces none.

    python tests/golden/make_bytes.py [LABEL...]
"""

import hashlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def main(labels: list[str]) -> None:
    from neuralcodec.codecs import registry
    from neuralcodec.codecs.bytefile import encode_bytes
    from test_bytes_binary import TEXT, bitmap, records
    from test_bytes_files import PROSE

    elf = b"\x7fELF\1\2\1" + bytes(9) + b"\0\2\0\2" + b"".join((0x40000000 + 900 - k).to_bytes(4, "big") for k in range(300))
    wave = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\1\0\2\0\x44\xac\0\0\x10\xb1\2\0\4\0\x10\0data" + records(200)
    pgm = b"P5\n40 60\n255\n" + bytes((x * y // 9 + 50) % 256 for y in range(60) for x in range(40))
    cases = {
        "empty": ("cm", b"", 5), "text-1": ("cm", TEXT * 9, 1), "text-5": ("cm", TEXT * 9, 5), "text-9": ("cm", TEXT * 9, 9),
        "records": ("cm", records(600), 6), "bitmap": ("cm", bitmap(960, 60), 5), "machine": ("cm", elf, 5),
        "sound": ("cm", wave, 5), "picture": ("cm", pgm, 7),
        "noise": ("cm", bytes(hashlib.sha256(bytes([k])).digest()[0] for k in range(256)), 5),
        "prose": ("test", PROSE * 3, 6),
    }  # fmt: skip
    path = HERE / "bytes.json"
    index = json.loads(path.read_text()) if path.exists() else {}
    for label, (preset, data, effort) in cases.items():
        name = f"bytes-{label}.nlc"
        if (HERE / name).exists() or labels and label not in labels:
            continue  # golden files are never replaced
        (HERE / name).write_bytes(encode_bytes(registry.load("nacrith", preset), data, effort))
        index[name] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
