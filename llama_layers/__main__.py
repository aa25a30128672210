"""``python -m llama_layers``: the command line."""

import sys

if __name__ == "__main__":  # and not where processes that it starts import it again
    from llama_layers.cli import main

    sys.exit(main())
