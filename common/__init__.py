"""Code shared by the three scripts: data, transforms, models, losses, stopping, runs, figures."""

import atexit
import os
import shutil
import tempfile


class UserError(Exception):
    """An error that the user can fix: the scripts print it as one line and exit with code 2."""


# A container may have no home folder, or a read-only one. wandb and matplotlib then print many
# warnings unless they get another folder for their caches.
if not os.access(os.environ.get("HOME", ""), os.W_OK):
    _caches = tempfile.mkdtemp(prefix="caches-")
    atexit.register(shutil.rmtree, _caches, ignore_errors=True)
    for _name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        os.environ.setdefault(_name, _caches)
