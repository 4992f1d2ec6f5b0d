"""A Hydra config repository over one folder, which remembers where every value stands.

Hydra's defaults-list code asks it which files exist, what they hold and what their own defaults lists are.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from flagscale_config.document import Document, read_document, shown_path
from flagscale_config.errors import ConfigError, Origin, Problem

__all__ = ["FolderRepository"]


class FolderRepository(ConfigRepository):  # type: ignore[misc]
    """The files below an experiment file's folder.

    Attributes:
        documents: every file read so far, by the path Hydra knows it under.
    """

    def __init__(self, root: Document) -> None:
        self.root = root
        self.folder = root.path.parent
        self.documents: dict[str, Document] = {}
        self.results: dict[str, ConfigResult | None] = {}

    def file_of(self, config_path: str) -> Path:
        """Return the file Hydra means by `train/tiny`; the experiment file goes by its own name."""
        if config_path == self.root.path.name:
            return self.root.path
        return Path(self.folder, config_path if config_path.endswith(".yaml") else f"{config_path}.yaml")

    def document(self, config_path: str) -> Document:
        """Read a file.

        Raises:
            ConfigError: it cannot be read, or holds neither a mapping nor a list.
        """
        if config_path not in self.documents:
            file = self.file_of(config_path)
            document = self.root if file == self.root.path else read_document(file)
            if document.data is not None and not isinstance(document.data, (dict, list)):
                message = "the file must hold `key: value` pairs, or a list"
                place = Origin(shown_path(file), 1, 1)
                raise ConfigError([Problem(code="config/not-a-mapping", message=message, origin=place)])
            self.documents[config_path] = document
        return self.documents[config_path]

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Return what Hydra knows of a file; None when there is none."""
        if config_path not in self.results:
            found = self._load(config_path) if self.config_exists(config_path) else None
            self.results[config_path] = found
        return self.results[config_path]

    def _load(self, config_path: str) -> ConfigResult:
        document = self.document(config_path)
        header = ConfigSource._get_header_dict(document.text)  # noqa: SLF001  the `# @package` line
        config = OmegaConf.create({} if document.data is None else document.data)
        result = ConfigResult(provider="main", path=str(self.folder), config=config, header=header)
        raw = self._extract_defaults_list(config_path, config)
        result.defaults_list = self._create_defaults_list(config_path, raw)
        return result

    def config_exists(self, config_path: str) -> bool:
        """Whether there is such a file."""
        return os.path.isfile(self.file_of(config_path))  # noqa: PTH113  Path raises on names too long to be

    def group_exists(self, config_path: str) -> bool:
        """Whether there is such a folder."""
        return os.path.isdir(Path(self.folder, config_path))  # noqa: PTH112  Path raises on names too long to be

    def get_group_options(self, group_name: str, results_filter: Any = ObjectType.CONFIG) -> list[str]:
        """Return the names of the files of a group."""
        del results_filter
        return sorted(file.stem for file in Path(self.folder, group_name).glob("*.yaml"))

    def get_sources(self) -> list[Any]:
        """Return no sources: Hydra lists them in error texts only, and ours say more."""
        return []
