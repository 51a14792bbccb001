import os

# Before torch is loaded: its threads sleep while they wait, so that tests beside other work do not crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
