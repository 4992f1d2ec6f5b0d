"""`python -m flagscale_serve.cli`."""

from flagscale_serve.cli import main

raise SystemExit(main())
