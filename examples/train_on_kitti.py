"""Train a small network on your own KITTI-layout data: python examples/train_on_kitti.py DATA OUT"""

import sys
from pathlib import Path

from convlstm_vo.evaluation.run import EvaluateOptions, run_evaluation
from convlstm_vo.models.config import preset
from convlstm_vo.sequences.kitti import sequence_names
from convlstm_vo.training.config import TrainConfig
from convlstm_vo.training.run import run_training

data, out = Path(sys.argv[1]), Path(sys.argv[2])
*training, held_out = sequence_names(data)

config = TrainConfig(
    data=data,
    out=out,
    sequences=tuple(training),
    validate=(held_out,),
    model=preset("tiny", image_height=96, image_width=320),
    batch_size=8,
    time_steps=5,  # gradients reach 5 motions back; the state is carried on over 4 such clips
    epochs=30,
    lr=1e-3,
    resume=True,  # started again, it goes on where it was stopped
)
checkpoint = run_training(config)
run_evaluation(EvaluateOptions(data=data, sequences=(held_out,), checkpoint=checkpoint), command=sys.argv[0])
