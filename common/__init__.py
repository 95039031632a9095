"""What the three scripts share: data, transforms, models, losses, stopping, training, figures."""


class UserError(Exception):
    """A mistake that the user can mend: the scripts print it as one line and exit with code 2."""
