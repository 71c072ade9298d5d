"""A plain copy of a model whose files are packed, for those who cannot read them; kept in the cache."""

from __future__ import annotations

import json
from pathlib import Path

from gkd.config import cache_folder
from gkd.models.fingerprint import model_fingerprint
from gkd.models.folders import copy_side_files, written_aside
from gkd.models.load import check_readable, read_config
from gkd.models.quantized_files import CONFIG, plain_tensors
from gkd.models.resolve import local_folder
from gkd.models.weights import write_weights


def is_packed(path: str, *, key: str) -> bool:
    """Whether a resolved model's files hold packed weights. Raises ModelError, starting with `key`, for what is not
    read here."""
    return check_readable(read_config(path, key=key), path, key, may_be_packed=True) is not None


def unpacked(path: str, *, key: str) -> str:
    """The folder of the same model with plain weights, in the dtype of its scales; made when it is first asked for."""
    folder = local_folder(path, key=key)
    scheme = check_readable(read_config(path, key=key), path, key, may_be_packed=True)
    assert scheme is not None
    target = cache_folder().absolute() / "models" / f"unpacked-{model_fingerprint(folder, key=key)}"
    if not target.is_dir():
        with written_aside(target) as partial:
            copy_side_files(folder, partial)
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            del config[CONFIG]
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            write_weights(partial, plain_tensors(Path(folder), scheme, key))
    return str(target)
