// The operator's description, its checks, and its CPU backend: an image is a task of DALI's thread
// pool.

#include "augment_views_op.h"

#include <atomic>

namespace spd {

SPD_DECLARE_AUGMENT(SPD_ISA)

using namespace ::dali;  // NOLINT: DALI's enums moved between namespaces

ViewsFormat::ViewsFormat(const ::dali::OpSpec& spec) {
    const auto size = spec.GetRepeatedArgument<int>("size");
    DALI_ENFORCE(size.size() == 2 && size[0] > 0 && size[1] > 0 && size[0] < most_side &&
                     size[1] < most_side,
                 "size must be the height and width of the views, pixels");
    height = size[0];
    width = size[1];
    const auto name = spec.GetArgument<std::string>("dtype");
    if (name == "float32") {
        dtype = DType::float32, stored = DALI_FLOAT;
    } else if (name == "float16") {
        dtype = DType::float16, stored = DALI_FLOAT16;
    } else if (name == "bfloat16") {
        dtype = DType::bfloat16, stored = DALI_UINT16;
    } else {
        DALI_ENFORCE(name == "uint8",
                     "dtype is one of float32, float16, bfloat16, uint8; got " + name);
        dtype = DType::uint8, stored = DALI_UINT8;
    }
    channels_last = spec.GetArgument<bool>("channels_last");
    views_first = spec.GetArgument<bool>("views_first");
    const auto mean = spec.GetRepeatedArgument<float>("mean");
    const auto std = spec.GetRepeatedArgument<float>("std");
    DALI_ENFORCE(mean.size() == 3 && std.size() == 3, "mean and std need 3 values");
    for (int c = 0; c < 3; ++c) {
        DALI_ENFORCE(std[c] > 0, "std must be above 0");
        const bool normalised = dtype != DType::uint8;
        scale[c] = normalised ? 1 / std[c] : 255;
        shift[c] = normalised ? -mean[c] / std[c] : 0;
    }
}

::dali::TensorShape<> ViewsFormat::sample_shape(int views) const {
    if (views_first) return {int64_t(views) * 3 * height * width};
    if (channels_last) return {views, height, width, 3};
    return {views, 3, height, width};
}

std::array<int64_t, 5> ViewsFormat::strides(int views, int64_t images) const {
    const int64_t view = int64_t(3) * height * width;
    std::array<int64_t, 5> stride{view, views * view, int64_t(height) * width, width, 1};
    if (views_first) stride[0] = images * view, stride[1] = view;
    if (channels_last) stride[2] = 1, stride[3] = int64_t(3) * width, stride[4] = 3;
    return stride;
}

int read_rows(const ViewsFormat& format, const ::dali::TensorListShape<>& images,
              ::dali::DALIDataType type, const ::dali::TensorList<CPUBackend>& params,
              std::vector<ViewParams>* table) {
    DALI_ENFORCE(type == DALI_UINT8 && images.sample_dim() == 3,
                 "images must be uint8, (height, width, 3)");
    DALI_ENFORCE(params.type() == DALI_FLOAT && params.sample_dim() == 2,
                 "params must be float32, (views, 27)");
    const int n = images.num_samples();
    const int views = n ? int(params.shape().tensor_shape_span(0)[0]) : 0;
    table->resize(size_t(n) * views);
    for (int i = 0; i < n; ++i) {
        const auto image = images.tensor_shape_span(i), rows = params.shape().tensor_shape_span(i);
        DALI_ENFORCE(image[2] == 3 && image[0] > 0 && image[1] > 0 && image[0] < most_side &&
                         image[1] < most_side,
                     "images must be (height, width, 3), with sides below 2^24");
        DALI_ENFORCE(rows[0] == views && rows[1] == view_columns,
                     "params must be (views, 27), with as many views for every image");
        ViewParams* to = table->data() + size_t(i) * views;
        memcpy(to, params.raw_tensor(i), views * sizeof(ViewParams));
        DALI_ENFORCE(
            rows_are_valid(to, views, float(image[0]), float(image[1]), float(format.height),
                           float(format.width)),
            "the parameters of image " + std::to_string(i) + " of the batch are not valid");
    }
    return views;
}

template <>
void AugmentViews<CPUBackend>::RunImpl(::dali::Workspace& ws) {
    const auto& images = ws.Input<CPUBackend>(0);
    const int n = images.num_samples();
    const auto shape = ::dali::uniform_list_shape(n, format_.sample_shape(views_));
    const size_t bytes = size_t(shape.num_elements()) * format_.itemsize();
    auto memory = memory_.take(max2(bytes, size_t(1)));

    std::vector<const uint8_t*> pixels(n);
    std::vector<int64_t> layout(4 * size_t(n));
    for (int i = 0; i < n; ++i) {
        const auto image = images.shape().tensor_shape_span(i);
        pixels[i] = images.tensor<uint8_t>(i);
        layout[4 * i] = i, layout[4 * i + 2] = image[0], layout[4 * i + 3] = image[1];
    }
    AugmentArgs args{};
    args.buffers = pixels.data();
    args.layout = layout.data();
    args.params = rows_.data();
    args.images = n;
    args.views = views_;
    args.out = memory.get();
    args.dtype = format_.dtype;
    const auto stride = format_.strides(views_, n);
    std::copy(stride.begin(), stride.end(), args.stride);
    args.height = format_.height;
    args.width = format_.width;
    std::copy(format_.scale, format_.scale + 3, args.scale);
    std::copy(format_.shift, format_.shift + 3, args.shift);

    std::atomic<bool> out_of_memory{false};
    auto& threads = ws.GetThreadPool();
    for (int i = 0; i < n; ++i)  // the largest images first, so that all threads end together
        threads.AddWork(
            [&, i](int) {
                if (!SPD_ISA::augment_image(args, i)) out_of_memory = true;
            },
            layout[4 * i + 2] * layout[4 * i + 3]);
    threads.RunAll();
    DALI_ENFORCE(!out_of_memory, "out of memory while making views");

    auto& out = ws.Output<CPUBackend>(0);
    out.Reset();
    out.ShareData(std::move(memory), bytes, false, shape, format_.stored,
                  ::dali::CPU_ONLY_DEVICE_ID, ::dali::AccessOrder::host(), format_.layout());
}

}  // namespace spd

DALI_SCHEMA(spd__AugmentViews)
    .DocStr(
        "All augmented views of each image, as spd_fast.augment_views makes them.\n\n"
        "Nothing is drawn here: the second input holds the parameters, (views, 27) float32 for "
        "each image, as fn.spd.sample_view_params gives them. The output holds (views, 3, height, "
        "width) for each image.")
    .NumInput(2)
    .NumOutput(1)
    .InputLayout(0, "HWC")
    .InputDevice(1, ::dali::InputDevice::CPU)
    .AddOptionalArg("size", "height and width of the views, pixels", std::vector<int>{224, 224})
    .AddOptionalArg("dtype",
                    "float32, float16, bfloat16 (given as its bits in uint16), or uint8, whose "
                    "views are not normalised",
                    "float32")
    .AddOptionalArg("channels_last", "memory order of each view: height, width, channel", false)
    .AddOptionalArg("views_first",
                    "the batch's memory as a whole is (views, images, 3, height, width), so that "
                    "view k of all images is one piece; its samples are then equal, flat parts",
                    false)
    .AddOptionalArg("mean", "per channel, of values in [0, 1]",
                    std::vector<float>{0.485f, 0.456f, 0.406f})
    .AddOptionalArg("std", "per channel, of values in [0, 1]",
                    std::vector<float>{0.229f, 0.224f, 0.225f});

DALI_REGISTER_OPERATOR(spd__AugmentViews, ::spd::AugmentViews<::dali::CPUBackend>, ::dali::CPU);
