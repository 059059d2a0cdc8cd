"""A virtual cache, and what it should hold, over a driver that holds fences and fails when told to.

Each fallible call of the driver has a number, so that a test can go through all of them.
"""

from vmalloc import VirtualKVCache, _core

from .backends import Contents, Engine, make_config


class FaultyEngine(Engine):
    """An engine over a driver that holds fences and fails when told to."""

    def __init__(self, shape="power of two", **changes):
        config = make_config(shape, **changes)
        self.driver = _core.FaultDriver(_core.make_host_driver(config.page_bytes))
        self.cache = VirtualKVCache(config, driver=self.driver)
        self.contents = Contents(self.cache)
        self.tokens = {}
        self.salts = {}

    def step(self):
        self.cache.end_step(self.cache.begin_step())
