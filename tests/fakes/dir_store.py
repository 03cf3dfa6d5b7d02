"""The store of `patchwork train`, under the name tests know it by."""

from workers.local.folder_store import FolderStore as DirStore

__all__ = ["DirStore"]
