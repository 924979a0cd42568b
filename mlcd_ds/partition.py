"""Which class lives in which shard. The one place that divides classes."""

from dataclasses import dataclass

from mlcd_ds.errors import ConfigError


@dataclass(frozen=True)
class ClassPartition:
    """`num_classes` rows in `num_shards` contiguous shards; the first `num_classes % num_shards` hold one row more."""

    num_classes: int
    num_shards: int

    def __post_init__(self):
        if self.num_classes < 1 or self.num_shards < 1:
            raise ConfigError(
                f"a partition needs at least one class and one shard, got num_classes={self.num_classes}, "
                f"num_shards={self.num_shards}"
            )
        if self.num_classes < self.num_shards:
            raise ConfigError(
                f"{self.num_classes} classes cannot be split over {self.num_shards} ranks: every rank needs at least "
                f"one center. Use at most {self.num_classes} ranks or more clusters."
            )

    def start(self, shard: int) -> int:
        """First global row of `shard`."""
        base, extra = divmod(self.num_classes, self.num_shards)
        return shard * base + min(shard, extra)

    def stop(self, shard: int) -> int:
        """One past the last global row of `shard`."""
        return self.start(shard + 1)

    def size(self, shard: int) -> int:
        """Rows of `shard`."""
        return self.stop(shard) - self.start(shard)

    @property
    def max_size(self) -> int:
        """Rows of the largest shard."""
        return self.size(0)
