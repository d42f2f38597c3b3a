"""The command `cifar-dist VERB`; each verb is also a module, as `python -m cifar_dist.train`."""

import importlib
import sys

from cifar_dist import __version__
from cifar_dist.errors import suggest
from cifar_dist.processes.streams import complain, open_streams

VERBS = {
    "train": "train a recipe, or resume a run",
    "evaluate": "evaluate a checkpoint on a dataset",
    "verify": "check the checkpoints of a run against their hashes",
    "predict": "classify images",
    "convert": "convert weights of torch.save to safetensors",
    "doctor": "check machines and configuration, or explain the log of a failed run",
    "parity": "train a few steps on one process and on several, and compare",
    "plan": "show what a launch would do, and its problems, without starting it",
}
LAUNCHING = ("plan", "doctor", "parity")


def main() -> int:
    """Run the verb named by the first argument and return its exit code."""
    open_streams()
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print("usage: cifar-dist VERB [options]; `cifar-dist VERB --help` lists the options\n")
        print("\n".join(f"  {name:10} {what}" for name, what in VERBS.items()))
        return 0
    if verb == "--version":
        print(f"cifar-dist {__version__}")
        return 0
    if verb not in VERBS:
        complain(f"error: unknown verb '{verb}'{suggest(verb, list(VERBS))}")
        return 2
    package = "cifar_dist.launching" if verb in LAUNCHING else "cifar_dist"
    module = importlib.import_module(f"{package}.{verb}")
    return int(module.main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
