// What torch tells of a tensor without a call of Python's: DLPack's exchange table, which
// torch.Tensor carries as __dlpack_c_exchange_api__ (torch 2.10 and later). The layout of these
// structures is DLPack's binary interface, version 1: https://github.com/dmlc/dlpack.
#pragma once

#include <stdint.h>

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  const DLPackExchangeAPI* previous;
  void* functions[3];  // which hand over ownership: of no use here
  // Fills in what the object, a torch.Tensor, is now; -1 with a Python error set if it has no
  // memory of its own (sparse, meta).
  int (*view)(void* object, DLTensor* out);
  void* current_stream;
};

constexpr uint8_t kDLUInt = 1, kDLFloat = 2, kDLBFloat = 4;
