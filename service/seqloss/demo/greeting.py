"""What to do with the demo service: a curl line that works, with ids from the demo's tokenizer."""

from __future__ import annotations

import argparse
import json

from tokenizers import Tokenizer

from seqloss.demo import CHECKPOINT

SOURCE = ">>de<< Thursday, March 5, 2026 at 4:05 PM"
TARGETS = ("Donnerstag, 5. März 2026 um 16:05", "Donnerstag, 5. März 2026 um 15:05")


def example_request() -> dict[str, object]:
    """A source with a right and a wrong translation, as token ids."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    return {
        "source_ids": [tokenizer.encode(SOURCE).ids],
        "target_ids": [tokenizer.encode(target).ids for target in TARGETS],
        "source_index": [0, 0],
    }


def main() -> None:
    """Prints the greeting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    address = f"http://localhost:{parser.parse_args().port}"
    right, wrong = TARGETS
    print(f"""
Serving the demo model on {address}; it is ready within seconds. In another terminal:

curl -s {address}/loss -H 'Content-Type: application/json' \\
  -d '{json.dumps(example_request())}'

These are the token ids of
  {SOURCE}
with two translations, one of them an hour off:
  {right}
  {wrong}
The first has a loss near 0, the second one above 10. See also {address}/docs,
{address}/models and {address}/metrics.
""")


if __name__ == "__main__":
    main()
