// The DALI operator fn.spd.sample_view_params: sizes of images and their places in the data set in,
// rows of parameters out.

#include <iterator>
#include <locale>
#include <sstream>
#include <string>
#include <vector>

#include "../view_params.h"
#include "dali/pipeline/operator/checkpointing/stateless_operator.h"
#include "dali/pipeline/operator/operator.h"

namespace spd {

using namespace ::dali;  // NOLINT: DALI's enums moved between namespaces

class SampleViewParams : public ::dali::StatelessOperator<CPUBackend> {
  public:
    explicit SampleViewParams(const ::dali::OpSpec& spec)
        : ::dali::StatelessOperator<CPUBackend>(spec) {
        const auto size = spec.GetRepeatedArgument<int>("size");
        DALI_ENFORCE(size.size() == 2, "size must be the height and width of the views, pixels");
        height_ = size[0];
        width_ = size[1];
        std::istringstream text(spec.GetArgument<std::string>("ranges"));
        text.imbue(std::locale::classic());  // whatever the program's decimal point is
        const std::vector<double> numbers{std::istream_iterator<double>(text), {}};
        DALI_ENFORCE(text.eof() && !numbers.empty() && numbers.size() % range_columns == 0,
                     "ranges must hold 29 numbers for each view");
        ranges_.resize(numbers.size() / range_columns);
        memcpy(ranges_.data(), numbers.data(), numbers.size() * sizeof(double));
    }

  protected:
    bool SetupImpl(std::vector<::dali::OutputDesc>& outputs, const ::dali::Workspace& ws) override {
        const auto& places = ws.Input<CPUBackend>(1);
        const ::dali::TensorShape<> shape{3};
        DALI_ENFORCE(places.type() == DALI_INT64 &&
                         places.shape() == ::dali::uniform_list_shape(places.num_samples(), shape),
                     "places must be int64: a seed, an epoch and an index for each image");
        DALI_ENFORCE(ws.GetInputDim(0) == 3, "images must be (height, width, 3)");
        const ::dali::TensorShape<> rows{int64_t(ranges_.size()), view_columns};
        outputs.resize(1);
        outputs[0] = {::dali::uniform_list_shape(places.num_samples(), rows), DALI_FLOAT};
        return true;
    }

    void RunImpl(::dali::Workspace& ws) override {
        const auto& sizes = ws.GetInputShape(0);
        const auto& places = ws.Input<CPUBackend>(1);
        auto& out = ws.Output<CPUBackend>(0);
        for (int i = 0; i < places.num_samples(); ++i) {
            const int64_t* place = places.tensor<int64_t>(i);
            const auto size = sizes.tensor_shape_span(i);
            auto* rows = reinterpret_cast<ViewParams*>(out.mutable_tensor<float>(i));
            draw_views(ranges_.data(), int(ranges_.size()), uint64_t(place[0]), uint64_t(place[1]),
                       uint64_t(place[2]), double(size[0]), double(size[1]), height_, width_, rows);
        }
    }

  private:
    int height_, width_;
    std::vector<ViewRanges> ranges_;
};

}  // namespace spd

DALI_SCHEMA(spd__SampleViewParams)
    .DocStr(
        "Rows of view parameters, (views, 27) float32 for each image, as "
        "spd_fast.sample_view_params draws them: each row is a function of the seed, the epoch, "
        "the "
        "image's index and the view alone.\n\n"
        "The first input is the decoded images, of which only the sizes are looked at; the second "
        "holds, for each image, the seed, the epoch and its index in the data set, (3,) int64.")
    .NumInput(2)
    .NumOutput(1)
    .InputDevice(0, ::dali::InputDevice::Metadata)
    .AddArg("ranges",
            "numbers separated by blanks, 29 for each view: spd_fast.views.range_table(recipe, "
            "height, width)",
            ::dali::type2id<std::string>::value)
    .AddOptionalArg("size", "height and width of the views, pixels", std::vector<int>{224, 224});

DALI_REGISTER_OPERATOR(spd__SampleViewParams, ::spd::SampleViewParams, ::dali::CPU);
