"""Serve a model folder over an OpenAI-compatible API: `transformers serve`, made to find this architecture.

    python -m scripts.export checkpoints/mlra_4_demo build/demo
    python -m scripts.serve build/demo --trust-remote-code --port 8000
    python -m scripts.serve build/demo --trust-remote-code --port 8000 --continuous-batching
    transformers chat build/demo http://localhost:8000/v1

All options are those of `transformers serve`, which needs `pip install 'mlra[serve]'`. By itself that
program looks an architecture up among the library's own classes only, and so serves no remote code.
"""

import sys

import transformers
from transformers.models.auto import modeling_auto

PLAIN_CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def register() -> None:
    """Make the server find MLRA, and let chat requests reach tokenizers without a chat template.

    A model that was not trained to chat has none; it is given the messages' texts, one under another, to continue.
    """
    transformers.MLRAForCausalLM = transformers.AutoModelForCausalLM
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mlra"] = "MLRAForCausalLM"
    own_template = transformers.PreTrainedTokenizerBase.get_chat_template

    def get_chat_template(self, chat_template=None, tools=None):
        if chat_template is None and self.chat_template is None:
            return PLAIN_CHAT
        return own_template(self, chat_template, tools)

    transformers.PreTrainedTokenizerBase.get_chat_template = get_chat_template


def main(arguments: list[str] | None = None) -> int:
    """Command line; runs until interrupted."""
    try:
        from transformers.cli.transformers import main as transformers_main
    except ImportError as error:
        print(f"error: {error}; install with: pip install 'transformers[serving]'", file=sys.stderr)
        return 2
    register()
    sys.argv = ["transformers", "serve", *(sys.argv[1:] if arguments is None else arguments)]
    transformers_main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
