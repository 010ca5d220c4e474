"""`python -m router_tuning` is `router-tuning`."""

from router_tuning.cli import main

if __name__ == "__main__":
    main()
