"""Settings that are paths: `~` and `$VARIABLE` are replaced in each, and none is forgotten."""

import re
import tempfile
from pathlib import Path

import pytest

from fastrdm.config import help, run_config
from fastrdm.loaders.sources.index_cache import cache_folder

NO_PATHS = {
    "loader.source": "a name, or code",
    "loader.download": "true or false",
    "loader.cache_gb": "a number",
    "loader.order": "a name",
    "evaluate.source": "a name, or code",
    "log.report": "true or false",
    "log.profile": "settings of its own",
}


def test_every_setting_that_speaks_of_a_folder_or_a_file_is_a_path() -> None:
    speaks = {s.key for s in help.walk(run_config.Config) if re.search(r"\b([Ff]older|[Ff]iles?)\b", s.description)}
    assert speaks - set(NO_PATHS) <= set(run_config.PATHS), "to be a row of PATHS, or of NO_PATHS with a reason"


@pytest.mark.parametrize("key", run_config.PATHS)
def test_home_and_variables(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    monkeypatch.setenv("PLACE", "/scratch")
    for text, path in (("~/x", "/users/me/x"), ("$PLACE/x", "/scratch/x"), ("timm:net:~/x", "timm:net:/users/me/x")):
        config = run_config.to_dict(run_config.load(["preset=simsiam", f"{key}={text}"]))
        assert run_config.below(config, *key.split(".")) == path
    with pytest.raises(ValueError, match=rf"^{key} must be a path, got '\$NOWHERE/x' with \$NOWHERE"):
        run_config.load(["preset=simsiam", f"{key}=$NOWHERE/x"])


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user id of a container that no password entry has."""

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert cache_folder(None).is_relative_to(tempfile.gettempdir())
