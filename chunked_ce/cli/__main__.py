"""`python -m chunked_ce.cli`, where the script is not on the path."""

from . import main

raise SystemExit(main())
