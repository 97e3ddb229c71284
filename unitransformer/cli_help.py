"""What `--help` says of the options of the commands that are no recipes."""

from argparse import Action

import jsonargparse


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Gives the type of an option that takes a value; a switch takes none."""

    def _get_type_str(self, action: Action) -> str | None:
        return None if action.nargs == 0 else super()._get_type_str(action)
