"""Models on disk: headers, conversion, sources, the catalog and its digests. Sees no tensor."""
