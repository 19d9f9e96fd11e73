"""The command line: `fuseopt COMMAND ...`, also `python -m fuseopt COMMAND ...`."""

import argparse
import importlib
import sys

import fuseopt


def _harness(command, module, more=None):
    """A command of fuseopt.finetune, which needs the extra `finetune` (and `more`, {module: package})."""

    def run(argv):
        from fuseopt import finetune

        if finetune.missing_extras(f"fuseopt {command}", more):
            return 2
        finetune.quiet_imports()
        return importlib.import_module(f"fuseopt.finetune.{module}").main(argv)

    return run


def _verify(argv):
    from fuseopt.verify.sweep import main

    return main(argv)


COMMANDS = {
    "finetune": (_harness("finetune", "cli"), "fine-tune a classifier of images or text with a fused optimizer"),
    "verify": (_verify, "check every rule, stage, dtype and backend on this machine; takes about a minute"),
    "compare": (_harness("compare", "compare"), "print and plot finished runs of finetune beside one another"),
    "search": (_harness("search", "search", {"optuna": "optuna"}), "search the best values of any options of finetune"),
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
