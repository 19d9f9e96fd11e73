"""The command line: `fuseopt COMMAND ...`, also `python -m fuseopt COMMAND ...`."""

import argparse
import sys

import fuseopt


def _finetune(argv):
    from fuseopt.finetune import main

    return main(argv)


def _verify(argv):
    from fuseopt.verify.sweep import main

    return main(argv)


COMMANDS = {
    "finetune": (_finetune, "fine-tune a pretrained model with a fused optimizer, checking every step"),
    "verify": (_verify, "check every rule, stage, dtype and backend on this machine; takes about a minute"),
}


def main(argv=None):
    """Run one command and return its exit status: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in COMMANDS:
        try:
            return COMMANDS[argv[0]][0](argv[1:])
        except KeyboardInterrupt:  # before the command could take care of it
            print("fuseopt: interrupted", file=sys.stderr)
            return 130
    commands = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="fuseopt",
        description="Fused PyTorch optimizers: masks, clipping, decay, pruning and EMA in one pass.",
        epilog=f"commands:\n{commands}\n\n`fuseopt COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fuseopt {fuseopt.__version__}")
    parser.add_argument("command", help="one of: " + ", ".join(COMMANDS))
    parser.error = lambda message: _refuse(argv, message)
    parser.parse_known_args(argv)
    return _refuse(argv, f"{argv[0]!r} is not a command")


def _refuse(argv, message):
    print(f"fuseopt: {message}; choose from: {', '.join(COMMANDS)} (see fuseopt --help)", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
