"""python -m bench [step | host | prune | masks | scaling | finetune | paper | pages]: the main table, or another."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the modules here import each other by their bare names

COMMANDS = ("step", "host", "prune", "masks", "scaling", "finetune", "paper", "pages")


def main() -> int:
    words = sys.argv[1:]
    name = words.pop(0) if words[:1] and not words[0].startswith("-") else "step"
    if name not in COMMANDS:
        print(f"python -m bench: there is no {name}; choose from: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(name).main(words)
    except KeyboardInterrupt:  # results are written last, and whole
        print("\ninterrupted: no result was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
