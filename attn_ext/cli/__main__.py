"""python -m attn_ext.cli is attn-ext."""

import sys

from attn_ext.cli.main import main

sys.exit(main())
