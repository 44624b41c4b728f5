"""Float32 error in units of the training graph's own: what exact algebra can still ruin."""

from __future__ import annotations

import torch
from torch import nn

from foldexport import probes as probing
from foldexport.certify import certify
from foldexport.certify.rounding import rounding
from foldexport.fold.rebuild import Record
from foldexport.interpret import outputs
from tests.hand_folds import IMAGE, column, fold_chain, plain, run
from tests.statistics import randomise


def test_float32_trouble_is_measured_and_located():
    """A huge shift that is added and taken off again: perfect in float64, ruinous in float32."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))
    graph, program = fold_chain(randomise(net, 0), IMAGE)
    first, second = program.module.folded0, program.module.folded1
    tau = torch.tensor([0.0, 0.0, 1e4, 0.0]).double()
    with torch.no_grad():
        second.bias.add_(second.weight[:, :, 0, 0] @ tau)
        first.bias.sub_(tau)
    value = program.records["folded0"][0].value
    program.records["folded0"] = [Record(value, column(torch.ones(4)), column(tau))]
    certificate = run(graph, program, noise_probes=probing.noise_probes(graph))
    assert certificate.ok and certificate.folded32 > 100
    worst = certificate.rounding.worst[0]
    assert (worst.module, worst.channel) == ("stage.0", 2)
    assert "'stage.0' channel 2" in certificate.rounding.warnings()[0]


def test_rounding_of_a_network_like_itself_is_one():
    graph, program = fold_chain(plain(example=torch.randn(4, 3, 10, 10)), IMAGE)
    found = certify(graph, program, probing.make(graph)[:1], noise_probes=probing.noise_probes(graph)).rounding
    assert found.samples == 8 and len(found.levels) == 1 and not found.worst and not found.warnings()


def test_more_samples_are_drawn_while_one_of_them_decides():
    """A sample that rounds badly in one network only, as gates over few pixels give: it counts, but among many."""
    graph, _ = fold_chain(plain(example=torch.randn(4, 3, 10, 10)), IMAGE)
    first = probing.noise_probes(graph)

    def off_by(share: float, only: object = None):
        def network(inputs: tuple) -> list:
            wanted = outputs(graph, inputs, torch.float64)
            unlucky = only is None or inputs is only
            return [leaf + share * leaf.abs().max() if unlucky else leaf for leaf in wanted]

        return network

    rare = rounding(graph, {"rare": off_by(1.2e-6, first[0].inputs)}, first)
    assert rare.multiples["rare"].multiple > 8
    more = rounding(graph, {"rare": off_by(1.2e-6, first[0].inputs)}, first, further=probing.further_noise_probes(graph))
    assert more.samples > 8 and more.multiples["rare"].multiple < rare.multiples["rare"].multiple
    steady = rounding(graph, {"steady": off_by(1.2e-6)}, first, further=probing.further_noise_probes(graph))
    assert steady.samples == 40 and steady.multiples["steady"].multiple > 8
    ruined = rounding(graph, {"ruined": off_by(1e-3)}, first, further=probing.further_noise_probes(graph))
    assert ruined.samples == 8 and ruined.multiples["ruined"].multiple > 100
