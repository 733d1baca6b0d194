"""What other libraries load by entry point: the Zarr codec, the xarray backend."""
