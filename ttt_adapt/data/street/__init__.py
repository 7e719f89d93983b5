"""Things to watch and try the library on that need no download: a street that the package renders itself."""
