// linfuse_ext._C: what the binary is, and its geometry for tests. No tensor crosses this module;
// the ops reach Python through torch.ops.linfuse, which loading the module registers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "geometry/axis_taps.h"
#include "geometry/make_geometry.h"
#include "kernels/simd.h"
#include "ops/engine.h"

#define LINFUSE_TEXT_(x) #x
#define LINFUSE_TEXT(x) LINFUSE_TEXT_(x)

#if defined(LINFUSE_COVERAGE)
extern "C" void __gcov_dump(void);
#endif

namespace py = pybind11;

namespace linfuse {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = LINFUSE_VERSION;
  info["built_with_torch"] = LINFUSE_TORCH_VERSION;
  info["compiler"] = compiler();
  info["instrument"] = LINFUSE_INSTRUMENT;
  info["simd"] = simd_name(simd_level());
  std::vector<std::string> available;
  for (SimdLevel level : simd_levels_available()) available.emplace_back(simd_name(level));
  info["simd_available"] = available;
#if defined(LINFUSE_WITH_CUDA)
  info["cuda"] = LINFUSE_CUDA_VERSION;
  info["cuda_architectures"] = LINFUSE_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

// (position, kernel element) of every tap of one position, seen from its row or its column.
using TapList = std::vector<std::pair<int64_t, int64_t>>;

std::vector<TapList> taps_by_column(const Geometry& g, int axis) {
  std::vector<TapList> lists;
  PositionTaps taps;
  for (int64_t i = 0; i < g.axis[axis].in; ++i) {
    taps.list_by_column(g, axis, i);
    TapList list;
    for (const TapGroup& group : taps.groups) {
      for (int64_t n = group.first; n < group.last; ++n) {
        list.emplace_back(group.position, taps.kernel[static_cast<size_t>(n)]);
      }
    }
    lists.push_back(std::move(list));
  }
  return lists;
}

std::vector<TapList> tap_lists(const AxisTaps& table) {
  std::vector<TapList> lists;
  for (int64_t p = 0; p + 1 < static_cast<int64_t>(table.start.size()); ++p) {
    TapList list;
    for (const TapGroup* group = table.begin(p); group != table.end(p); ++group) {
      for (int64_t n = group->first; n < group->last; ++n) {
        list.emplace_back(group->position, table.kernel[static_cast<size_t>(n)]);
      }
    }
    lists.push_back(std::move(list));
  }
  return lists;
}

}  // namespace
}  // namespace linfuse

PYBIND11_MODULE(_C, m) {
  using linfuse::Geometry;
  m.doc() = "The compiled part of linfuse_ext; importing it registers torch.ops.linfuse.";
  m.def("build_info", &linfuse::build_info, "How and for what this binary was built.");

  py::class_<Geometry>(m, "Geometry", "csrc/geometry/geometry.h, for white-box tests.")
      .def_property_readonly("rows", &Geometry::rows)
      .def_property_readonly("cols", &Geometry::cols)
      .def_property_readonly("in_channels", [](const Geometry& g) { return g.in_channels; })
      .def_property_readonly("out_channels", [](const Geometry& g) { return g.out_channels; })
      .def_property_readonly("output_size",
                             [](const Geometry& g) {
                               return std::make_tuple(g.axis[0].out, g.axis[1].out, g.axis[2].out);
                             })
      .def("weight_index", &Geometry::weight_index, py::arg("c_out"), py::arg("c_in"))
      .def("fine_position", &Geometry::fine_position, py::arg("axis"), py::arg("coarse"),
           py::arg("k"))
      .def(
          "taps_by_row",
          [](const Geometry& g, int axis) {
            return linfuse::tap_lists(linfuse::taps_by_row(g, axis));
          },
          py::arg("axis"))
      .def(
          "taps_by_column",
          [](const Geometry& g, int axis) { return linfuse::taps_by_column(g, axis); },
          py::arg("axis"));

  m.def("set_engine", &linfuse::set_engine, py::arg("name"),
        "Lets fuse_conv_linear go by our kernels (\"own\"), by torch's convolution (\"torch\") or "
        "by the package's choice (\"auto\") from now on; returns what held before.");
  m.def("set_way", &linfuse::set_way, py::arg("name"),
        "Lets a fused product on a CPU go by the way that costs least (\"cheapest\") or by one of "
        "them (\"input\", \"tiles\", \"output\", \"columns\", \"position\", "
        "\"position_tiles\") from now on, for "
        "tests; returns what held before. A layer that cannot go that way is a ValueError.");

#if defined(LINFUSE_COVERAGE)
  m.def("write_coverage", &__gcov_dump,
        "Writes gcov's counters; a process that is ended does not.");
#endif

  m.def(
      "make_geometry",
      [](const std::string& op, const std::vector<int64_t>& weight_size,
         const std::vector<int64_t>& input_size, const std::vector<int64_t>& stride,
         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
         bool transposed, const std::vector<int64_t>& output_padding,
         const std::string& padding_mode) {
        return linfuse::make_geometry(
            op.c_str(), {weight_size, input_size, stride, padding, dilation, groups, transposed,
                         output_padding, padding_mode});
      },
      py::arg("op"), py::arg("weight_size"), py::arg("input_size"), py::arg("stride"),
      py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("transposed"),
      py::arg("output_padding"), py::arg("padding_mode"),
      "Checks the arguments of an op and returns its Geometry; ValueError where they are wrong.");
}
