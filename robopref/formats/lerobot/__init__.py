"""LeRobot datasets: read in versions 2.0, 2.1 and 3.0, written in 2.1 and 3.0, without importing lerobot.

A dataset is a folder. `meta/info.json` names its features, their types and the templates of its paths; the rows of
Parquet files are the frames, with vectors and, where cameras are stored as images, PNG bytes; videos are MP4 files.
Version 2 has a file per episode; version 3 packs many episodes into a file and says in `meta/episodes` where each is.

What a frame means: row t holds observation t and the action that followed it, and `next.*` what that action led to.
There is no observation after the last action. The layout is that of what the lerobot package writes: 0.3.3 for
version 2, 0.4.4 for version 3.

Our own writer adds two files that LeRobot passes over, so that nothing is lost between two stores of ours:

* `meta/robopref.json`: spaces, how the environment was made, description, splits, the order of the observation;
* `meta/robopref_episodes.jsonl`: for each episode its seed, its origin and the rows that LeRobot has no place for: the
  final observation, the infos that came with it, and success on reset.
"""

from robopref.formats.lerobot.reader import LeRobotSource, read_lerobot
from robopref.formats.lerobot.writer import write_lerobot

__all__ = ["LeRobotSource", "read_lerobot", "write_lerobot"]
