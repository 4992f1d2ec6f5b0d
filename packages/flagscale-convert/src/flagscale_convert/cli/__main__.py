"""`python -m flagscale_convert.cli`."""

from flagscale_convert.cli import main

raise SystemExit(main())
