"""Products with packed weights on CPUs, by a C++ library that is built at the first use."""
