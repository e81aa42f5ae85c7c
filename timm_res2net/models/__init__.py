"""The networks: the Res2Net block, the trunks that host it, and the table of variants."""
