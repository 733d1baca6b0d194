"""Made the golden streams, once. Never run by a test; a new format version or test model adds files, it replaces none.

    python tests/golden/make.py hyperprior:test
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def main(model: str) -> None:
    from contract import photo
    from neuralcodec.codecs import registry
    from neuralcodec.codecs.image import decode_picture, encode_picture
    from neuralcodec.container import dumps
    from neuralcodec.media.image import Picture

    codec = registry.load(*registry.split(model))
    index_path = HERE / "index.json"
    index = json.loads(index_path.read_text()) if index_path.exists() else {}
    pixels = photo()
    alpha = (np.add.outer(np.arange(90), np.arange(70)) % 256).astype(np.uint8)
    cases = {
        "photo": (Picture(pixels[:128, :192]), 450, 1024),
        "tiles": (Picture(pixels), 200, 128),
        "grey-alpha": (Picture(pixels[:90, :70, :1], alpha, exif=b"Exif\0\0golden"), 800, 1024),
        "pixel": (Picture(pixels[:1, :1]), 1000, 1024),
    }
    for label, (picture, level, tile) in cases.items():
        name = f"{model.replace(':', '-')}-{label}.nlc"
        if (HERE / name).exists():
            raise SystemExit(f"{name} exists: golden files are never replaced")
        trace: dict = {}
        stream = encode_picture(codec, picture, level, tile=tile, trace=trace)
        (HERE / name).write_bytes(dumps(stream))
        decoded = decode_picture(codec, stream).pixels
        index[name] = {
            "model": model, "symbols": {f"{c},{r}": v for (c, r), v in trace.items()}, "shape": list(decoded.shape),
            "mean": [round(float(m), 3) for m in decoded.reshape(-1, decoded.shape[2]).mean(0)],
        }  # fmt: skip
    index_path.write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
