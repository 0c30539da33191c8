from credit.cli import main

raise SystemExit(main())
