"""launch/doctor.py with something wrong with one rank: FAULT is its number and what, of examined.py."""

import os
from pathlib import Path

DOCTOR = str(Path(__file__).resolve().parents[1] / "launch" / "doctor.py")

rank, what = os.environ["FAULT"].split()
if os.environ.get("RANK") == rank:
    import examined

    examined.faulty(what).start()
exec(compile(Path(DOCTOR).read_text(), DOCTOR, "exec"))  # runpy would put its name into sys.argv, which is run again
