"""Run the command as `python -m flagscale_hw`."""

from flagscale_hw.cli import main

raise SystemExit(main())
