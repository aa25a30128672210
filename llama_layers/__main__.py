"""``python -m llama_layers``: the command line."""

import sys

from llama_layers.cli import main

sys.exit(main())
