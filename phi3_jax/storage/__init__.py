"""Files in object stores, by their URLs: gs://, s3:// and whatever else fsspec opens. Needs no JAX."""
