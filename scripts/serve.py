"""Serve a model folder over an OpenAI-compatible API: `transformers serve`, made to find this architecture.

    python -m scripts.export checkpoints/mlra_4_demo build/demo
    python -m scripts.serve build/demo --trust-remote-code --port 8000
    python -m scripts.serve build/demo --trust-remote-code --port 8000 --continuous-batching
    transformers chat build/demo http://localhost:8000/v1

All options are those of `transformers serve` (its --help lists them), which needs `pip install 'mlra[serve]'`. By
itself that program looks an architecture up among the library's own classes only, and so serves no remote code.
"""

import argparse
import re
import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # it also runs as a file

from scripts import cli
from scripts.cli import UserError, check_model_folder

PLAIN_CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def model_folders(options: list[str]) -> list[Path]:
    """The model folders among the options: those that are there, and a first one that is not and is no Hub name."""
    folders = [Path(option) for option in options if Path(option).is_dir()]
    for first in options[:1]:
        is_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", first) and not Path(first).parent.is_dir()
        if not (first.startswith("-") or is_name or Path(first).exists()):
            folders.append(Path(first))
    return folders


def check(args: argparse.Namespace) -> None:
    for folder in model_folders(args.options):
        check_model_folder(folder)


def main(argv: list[str] | None = None) -> int:
    """Command line; runs until interrupted."""
    options = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(options):
        print(__doc__)
        return 0
    return cli.run("scripts.serve:serve", argparse.Namespace(options=options), check)


if __name__ == "__main__":
    sys.exit(main())

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from scripts.loading import check_weights, has_tokenizer, load_config, load_tokenizer


def register() -> None:
    """Make the server find MLRA, and let chat requests reach tokenizers without a chat template.

    A model that was not trained to chat has none; it is given the messages' texts, one under another, to continue.
    """
    # Where the server will look: importing some of the library's parts puts another object into its place
    sys.modules["transformers"].MLRAForCausalLM = AutoModelForCausalLM
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mlra"] = "MLRAForCausalLM"
    own_template = PreTrainedTokenizerBase.get_chat_template

    def get_chat_template(self, chat_template=None, tools=None):
        if chat_template is None and self.chat_template is None:
            return PLAIN_CHAT
        return own_template(self, chat_template, tools)

    PreTrainedTokenizerBase.get_chat_template = get_chat_template


def serve(args: argparse.Namespace) -> None:
    """Check the model folder, if one is given, and run the server."""
    for folder in model_folders(args.options):
        check_weights(folder)
        if has_tokenizer(folder):
            load_tokenizer(folder, load_config(folder).vocab_size)
    try:
        from transformers.cli.transformers import main as transformers_main
    except ImportError as error:
        raise UserError(f"{error}; install with: pip install 'transformers[serving]'") from error
    register()
    for number in cli.ENDING:  # the server ends its threads and connections, then the process by the same signal
        signal.signal(number, signal.SIG_DFL)
    sys.argv = ["transformers", "serve", *args.options]
    transformers_main()
