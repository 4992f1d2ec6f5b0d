"""The vendors: `gates` decides by files which are here, and one module each describes their devices."""

__all__: list[str] = []
