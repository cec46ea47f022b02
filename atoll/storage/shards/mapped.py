"""Columns whose latents are computed while they are read, such as normalised ones."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from atoll.storage.shards.format import LATENTS

LatentMap = Callable[[Tensor], Tensor]  # latents [n, C, H, W] to latents of the same shape and dtype


class MappedColumns(Mapping[str, Tensor]):
    """The columns of a shard with other latents. Passes that do not read the latents do not compute them."""

    def __init__(self, columns: Mapping[str, Tensor], latent_map: LatentMap):
        self._columns, self._map, self._computed = columns, latent_map, dict[str, Tensor]()

    def __getitem__(self, name: str) -> Tensor:
        if name not in LATENTS:
            return self._columns[name]
        if name not in self._computed:
            self._computed[name] = self._map(self._columns[name])
        return self._computed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)
