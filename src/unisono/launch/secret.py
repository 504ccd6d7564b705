"""The job's secret, from a file that nobody else can read or from the environment; never from the command line."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from unisono.errors import ConfigurationError

VARIABLE = "UNISONO_SECRET"
SHORTEST = 16


def find_secret(path: Path | None, environ: Mapping[str, str]) -> bytes:
    """The secret that the launchers of all hosts share.

    Arguments:
        path: a file of the user's own with mode 0600; else the environment's `VARIABLE` is taken.

    Raises:
        ConfigurationError: where there is none, it is too short, or others could read it.
    """
    if path is None:
        secret = environ.get(VARIABLE, "").strip().encode()
        if not secret:
            raise ConfigurationError(
                f"several hosts need a secret that all of them know: --secret-file FILE (mode 0600), or {VARIABLE} in "
                "the environment; make one with: (umask 077; head -c 32 /dev/urandom | base64 > job.secret)"
            )
    else:
        try:
            status = path.stat()
            secret = path.read_bytes().strip()
        except OSError as error:
            raise ConfigurationError(f"cannot read the secret in {path}: {error.strerror}") from error
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or status.st_uid != os.getuid():
            raise ConfigurationError(
                f"the secret in {path} can be read by others (mode {stat.S_IMODE(status.st_mode):04o}); "
                f"make it yours alone: chmod 600 {path}"
            )
    if len(secret) < SHORTEST:
        raise ConfigurationError(f"the secret has {len(secret)} bytes; use at least {SHORTEST}")
    return secret
