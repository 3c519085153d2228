"""`python -m clipcap_lib`"""

from clipcap_lib.cli import main

raise SystemExit(main())
