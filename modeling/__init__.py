"""Networks, fusion, metrics, bundles and engines. Never imports ray."""
