import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.Status;
import com.img2img.v1.GenerateRequest;
import com.img2img.v1.GenerateResponse;
import com.img2img.v1.ImageFormat;
import com.img2img.v1.Img2ImgServiceGrpc;
import com.img2img.v1.Img2ImgServiceGrpc.Img2ImgServiceBlockingStub;
import com.img2img.v1.InitImage;
import com.img2img.v1.JobEvent;
import com.img2img.v1.JobSpec;
import com.img2img.v1.WatchJobRequest;
import com.img2img.v1.WatchJobResponse;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Iterator;
import java.util.UUID;
import java.util.concurrent.TimeUnit;

/**
 * Creates an image and shows its previews; resumes the stream if the connection breaks.
 *
 * <p>java Generate IMAGE PROMPT STRENGTH; IMG2IMG_SERVER and IMG2IMG_API_KEY name the server and the key.
 */
public final class Generate {
  private final Img2ImgServiceBlockingStub service;
  private String job = ""; // the name, as soon as it is known
  private long sequence; // number of the last event

  private Generate(Img2ImgServiceBlockingStub service) {
    this.service = service;
  }

  public static void main(String[] arguments) throws Exception {
    ManagedChannel channel =
        ManagedChannelBuilder.forTarget(setting("IMG2IMG_SERVER", "127.0.0.1:50051"))
            .usePlaintext()
            .maxInboundMessageSize(Integer.MAX_VALUE) // a large PNG exceeds the default of 4 MiB
            // Without pings, a connection that is lost silently is not noticed.
            .keepAliveTime(10, TimeUnit.SECONDS)
            .keepAliveTimeout(10, TimeUnit.SECONDS)
            .build();
    Metadata key = new Metadata();
    key.put(
        Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER),
        "Bearer " + setting("IMG2IMG_API_KEY", "dev-key"));
    JobSpec spec =
        JobSpec.newBuilder()
            .setInitImage(
                InitImage.newBuilder()
                    .setData(ByteString.copyFrom(Files.readAllBytes(Path.of(arguments[0])))))
            .setPrompt(arguments[1])
            .setStrength(Double.parseDouble(arguments[2]))
            .setSeed(1)
            .setOutputFormat(ImageFormat.IMAGE_FORMAT_PNG)
            .setPreviewIntervalSteps(1)
            .build();
    try {
      Img2ImgServiceBlockingStub service =
          Img2ImgServiceGrpc.newBlockingStub(channel)
              .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(key));
      new Generate(service).run(spec);
    } catch (StatusRuntimeException error) {
      explain(error);
      System.exit(1);
    } finally {
      channel.shutdownNow();
    }
  }

  private static String setting(String name, String otherwise) {
    return System.getenv().getOrDefault(name, otherwise);
  }

  private void run(JobSpec spec) throws IOException, InterruptedException {
    // With an id, a second Generate does not create a second job.
    GenerateRequest request =
        GenerateRequest.newBuilder()
            .setSpec(spec)
            .setRequestId(UUID.randomUUID().toString())
            .build();
    for (int failures = 0; ; ) {
      long before = sequence;
      try {
        if (follow(request)) {
          return;
        }
      } catch (StatusRuntimeException error) {
        failures = sequence > before ? 1 : failures + 1;
        if (error.getStatus().getCode() != io.grpc.Status.Code.UNAVAILABLE || failures > 5) {
          throw error;
        }
        System.out.println("connection lost after event " + sequence);
        Thread.sleep(100L << failures);
      }
    }
  }

  /** Reads one stream. Returns whether the job has ended. */
  private boolean follow(GenerateRequest request) throws IOException {
    if (job.isEmpty()) {
      Iterator<GenerateResponse> responses = service.generate(request);
      while (responses.hasNext()) {
        if (handle(responses.next().getEvent())) {
          return true;
        }
      }
      return false;
    }
    Iterator<WatchJobResponse> responses =
        service.watchJob(
            WatchJobRequest.newBuilder().setName(job).setAfterSequence(sequence).build());
    while (responses.hasNext()) {
      if (handle(responses.next().getEvent())) {
        return true;
      }
    }
    return false;
  }

  /** Prints an event and stores its image. Returns whether it is the last one of the job. */
  private boolean handle(JobEvent event) throws IOException {
    job = event.getJob().isEmpty() ? job : event.getJob();
    sequence = Math.max(sequence, event.getSequence());
    switch (event.getEventCase()) {
      case STEP:
        System.out.printf(
            "%d step %d of %d%n", sequence, event.getStep().getStep(), event.getStep().getTotal());
        return false;
      case PREVIEW:
        Files.write(Path.of("preview.jpg"), event.getPreview().getImage().getData().toByteArray());
        System.out.printf("%d preview%n", sequence);
        return false;
      case SAMPLE_FINISHED:
        Files.write(
            Path.of("output.png"), event.getSampleFinished().getImage().getData().toByteArray());
        System.out.printf("%d output.png%n", sequence);
        return false;
      case SUCCEEDED:
      case CANCELLED:
        System.out.printf("%d %s%n", sequence, event.getEventCase().name().toLowerCase());
        return true;
      case FAILED:
        System.out.printf(
            "%d failed: %s%n", sequence, event.getFailed().getJob().getError().getReason());
        return true;
      default: // snapshots, heartbeats and kinds that later versions add
        return false;
    }
  }

  /** Prints an error with its details. */
  private static void explain(StatusRuntimeException error) throws InvalidProtocolBufferException {
    System.err.println(error.getStatus().getCode() + ": " + error.getStatus().getDescription());
    Status status = StatusProto.fromThrowable(error);
    for (Any detail : status.getDetailsList()) {
      if (detail.is(ErrorInfo.class)) {
        System.err.println("reason " + detail.unpack(ErrorInfo.class).getReason());
      } else if (detail.is(BadRequest.class)) {
        for (BadRequest.FieldViolation violation :
            detail.unpack(BadRequest.class).getFieldViolationsList()) {
          System.err.printf(
              "field %s %s: %s%n",
              violation.getField(), violation.getReason(), violation.getDescription());
        }
      }
    }
  }
}
