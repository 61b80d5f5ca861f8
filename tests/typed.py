"""mypy reads the README's listings against the package's types, as a user's would: ``pip install mypy; python tests/typed.py``."""

import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The listings are checked in full, this package for what they use of it; TorchRL says nothing of its types.
OPTIONS = ["--check-untyped-defs", "--warn-unreachable", "--follow-imports=silent", "--ignore-missing-imports"]


def main() -> int:
    """Exit status of mypy, whose report goes to the terminal."""
    from mypy import api  # no part of the extra `test`

    listings = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    os.environ["MYPYPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"listing_{number}.py") for number in range(len(listings))]
        for file, listing in zip(files, listings, strict=True):
            file.write_text(listing)
        report, errors, status = api.run([*OPTIONS, *map(str, files)])
    sys.stdout.write(report + errors)
    return status


if __name__ == "__main__":
    sys.exit(main())
