"""python -m attn_ext is attn-ext."""

import sys

from attn_ext.cli.main import main

sys.exit(main())
