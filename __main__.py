"""``python -m neuralcodec``: the ``codec`` command."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # ``-m`` puts the current folder first on the path; inside the source tree our codecs/ and datasets/ would
    # shadow packages of these names
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]

    from neuralcodec.cli import main

    raise SystemExit(main())
